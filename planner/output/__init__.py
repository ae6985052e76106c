"""Files and folders that appear only when they are whole."""
