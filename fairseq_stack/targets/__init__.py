"""The teacher's targets: computed live, or stored once and read again."""
