"""ControlNets: their files, their cache on the device, and their residuals in a forward."""
