"""What a job names in the store, fetched and checked."""
