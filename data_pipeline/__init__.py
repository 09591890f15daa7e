"""From raw files to batches: readers, records, cleaning, tokens, packing, datasets; imports model and common."""
