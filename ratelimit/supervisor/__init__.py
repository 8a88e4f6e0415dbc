"""Everything of one machine under one command: Redis, engines, controller and gateways."""
