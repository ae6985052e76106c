"""The flags that several commands have, each defined once; dataclasses group them."""
