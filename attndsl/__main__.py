"""The command line as `python -m attndsl`."""

from attndsl.cli import app_main

app_main()
