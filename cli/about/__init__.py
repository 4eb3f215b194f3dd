"""Commands about the program itself: settings, completion, version. They load no model."""
