"""The real protocol of moves over engines whose KV knows its prefix; one seed, one history."""
