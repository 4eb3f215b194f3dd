"""Tools of MCP servers (Model Context Protocol): started, listed, called when allowed. Knows no engine."""
