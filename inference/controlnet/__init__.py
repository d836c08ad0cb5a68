"""ControlNets: those the settings name, which of them are on the device, and what they add to a forward."""
