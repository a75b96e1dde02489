"""Reading run directories: tables, exit times across seeds, pictures and reports."""
