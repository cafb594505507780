"""What the tests of all commands check alike."""


def assert_refused(main, arguments, message, capsys):
    """Bad settings are one line on stderr."""
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def assert_same_table(report, rows, tmp_path):
    """The committed table is that of the committed rows; a picture is drawn."""
    path = tmp_path / rows.name
    path.write_text(rows.read_text())
    report.write(path)
    table = path.with_suffix(".md").read_text()
    assert table == rows.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000
