"""`python -m kapsl_scheduler`: the command line."""

from kapsl_scheduler.cli import main

main()
