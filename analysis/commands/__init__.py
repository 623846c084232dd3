"""Commands of `bhlog`: each parses, calls one function and prints."""
