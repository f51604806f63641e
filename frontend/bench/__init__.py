"""The load generator of `baton bench serve`: what is asked, how it is sent, what is reported."""
