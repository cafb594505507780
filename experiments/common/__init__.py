"""What every question uses: command lines, processes, checkpoints, reports."""
