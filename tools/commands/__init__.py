"""The subcommands of `symmem`, one module each."""
