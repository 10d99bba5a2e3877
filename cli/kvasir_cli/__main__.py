"""`python -m kvasir_cli`: the command kvasir, for machines where it is not on the PATH."""

from kvasir_cli.main import main

main()
