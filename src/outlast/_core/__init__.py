"""What two rooms or more share: small mathematics, files, results, annotations. Nothing here is public."""
