"""How training scales: what a run measured, what runs show side by side, plans before a launch, checks of machines."""
