"""Run the command line: `python -m qlip` is `qlip`."""

from qlip.cli.main import main

main()
