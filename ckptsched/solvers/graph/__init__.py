"""Integer programs and cuts for graphs."""
