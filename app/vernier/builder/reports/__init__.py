"""What a build tells: table, report.json, report.html and its pictures."""
