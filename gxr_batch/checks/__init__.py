"""What is looked for in a row's cells, prompt and text: hints for the people who review it."""
