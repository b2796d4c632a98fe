"""Speed, as ratios against peers measured in the same interleaved run, beside the machine's own limits."""
