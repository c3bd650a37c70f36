"""Training an adapter: from a file of examples to a PEFT directory. Needs the optional extra `onebase[tune]`."""
