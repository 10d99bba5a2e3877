"""One module per group of subcommands: options in, calls out."""
