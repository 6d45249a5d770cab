"""Which types nodes may compute in, and models cut into pieces at them."""
