"""Files on local disks and in remote storage.

`Storage` reads and writes whole files and ranges by address; `retry.py` repeats remote requests under a `RetryPolicy`
and names the errors. Three readers are built on it: `Prefetcher` (spans announced before they are needed),
`ChunkedReader` (front to back) and `RemoteFile` (a Python file object).
"""
