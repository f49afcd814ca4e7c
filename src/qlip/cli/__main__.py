"""`python -m qlip.cli` is `qlip`."""

from qlip.cli.main import main

main()
