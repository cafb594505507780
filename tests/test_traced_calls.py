"""An update of one leaf passes through few hands; see :mod:`tests.traced_calls`."""

from tests import traced_calls

# Half of what the first version had, 305, 240 and 459; optax.adafactor with momentum
# has 39, optax.contrib.muon 106.
LIMITS = {"flora": 152, "compressed_accumulation": 120, "flora_adamw": 229}


def test_few_python_calls_while_an_update_is_traced():
    found = traced_calls.figures()
    print(traced_calls.table(found))
    assert all(found[name].total() > 10 for name in found)
    assert {x: found[x].total() for x in LIMITS if found[x].total() > LIMITS[x]} == {}
