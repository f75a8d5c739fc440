"""Tables, figures and the page that a person reads."""
