"""One file per defence; registering is done in the file itself."""
