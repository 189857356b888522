"""Models whose forward is recorded: overheads, the recording itself, and streams of batches."""
