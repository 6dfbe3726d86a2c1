"""What is looked for in the texts of a row, before and after it is generated; pure, fast, without downloads."""
