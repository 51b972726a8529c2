"""The commands of `nat-models`, a module each: flags in, a call of the library out."""
