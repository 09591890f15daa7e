"""Models for many users at once: engine, HTTP API, web page; imports evaluation and the packages below it."""
