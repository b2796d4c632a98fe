"""Programs that show the library at work, and the graphs they run on."""
