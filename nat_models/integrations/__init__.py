"""What serves users of other packages; nothing here is imported until it is asked for."""
