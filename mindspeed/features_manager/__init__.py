"""Names that other projects import to add features of the older form; new ones derive from `mindspeed.patching.Feature`."""
