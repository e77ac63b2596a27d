"""Operator bodies that call torch_npu; a file is imported at the first call of its family on an NPU tensor, never earlier.

A body calls torch_npu by keyword and passes optional arguments only where the installed version knows them (`known`).
`tests/npu_contract` runs every body on the real torch_npu without a device.
"""
