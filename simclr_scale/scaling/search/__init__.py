"""Looking for an encoder by short trainings, without labels or with them."""
