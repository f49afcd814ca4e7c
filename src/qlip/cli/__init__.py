"""The command `qlip`: one module a command family, each thin: parse, call, print."""
