"""Texts and HTML of the web page; imports only serving.chat_model."""
