"""The report: what every stage left behind, on one page for people."""
