"""A page to look at prepared directories: `moai view DIR ...`. It reads, and writes nothing."""
