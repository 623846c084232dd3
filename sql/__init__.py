"""Questions to a log in SQL, one a file; shipped as data."""
