"""Keys of a bucket in ascending order, from servers that list in another.

S3 promises the order of the keys' bytes. Servers that keep a tree (SeaweedFS) list in the tree's
order instead: `a/b` before `a-b`, with whole directories in between, and their `StartAfter` leaves
out what that order puts earlier. So the bucket is walked one directory at a time, where the two
orders differ only in the place of a directory among its siblings (`a` or `a/`), which a small heap
puts right. It costs a request per directory; destinations have few.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from storage_backends.base import ObjectInfo, directory_of, is_valid_key
from storage_backends.s3.bucket import Bucket


def walk(bucket: Bucket, *, prefix: str, start_after: str, page_keys: int) -> Iterator[ObjectInfo]:
    """Objects whose key begins with `prefix` and is greater than `start_after`, in ascending order."""
    directory = directory_of(prefix)
    if directory is None:
        return  # not asked: some servers take `a//` for `a/`
    found: dict[str, ObjectInfo] = {}
    for key in _level(bucket, directory, prefix, start_after, found=found, page_keys=page_keys):
        if key.endswith("/"):
            if is_valid_key(key[:-1]) and (key > start_after or start_after.startswith(key)):
                yield from walk(bucket, prefix=key, start_after=start_after, page_keys=page_keys)
        else:
            info = found.pop(key)
            if key > start_after and is_valid_key(key):
                yield info


def _level(
    bucket: Bucket,
    directory: str,
    prefix: str,
    start_after: str,
    *,
    found: dict[str, ObjectInfo],
    page_keys: int,
) -> Iterator[str]:
    """Names of one directory in ascending order, its objects noted in `found`.

    Whatever a later page brings has a name that is greater than this page's greatest, a directory's
    slash left aside, in both orders. So what is not greater than that can go out.
    """
    waiting: list[str] = []
    token: str | None = None
    server_start = _safe_start(directory, prefix, start_after)
    while True:
        page = bucket.list_level(prefix, start_after=server_start, token=token, max_keys=page_keys)
        for key, (size_bytes, modified_at) in page.objects.items():
            # The directory itself, as an empty object, is how some tools make directories.
            if not key.endswith("/"):
                found[key] = ObjectInfo(key, size_bytes, modified_at)
                heapq.heappush(waiting, key)
        for key in page.directories:
            heapq.heappush(waiting, key)
        names = [key.rstrip("/") for key in (*page.objects, *page.directories)]
        token = page.next_token
        while waiting and (token is None or (names and waiting[0] <= max(names))):
            yield heapq.heappop(waiting)
        if token is None:
            return


def _safe_start(directory: str, prefix: str, start_after: str) -> str:
    """A `StartAfter` that leaves out nothing wanted in either order; "" for none.

    Wanted are also directories whose name is a prefix of start_after's here, or of it up to a
    character below the slash. Without its last character no name that begins like it is left out.
    """
    if not start_after.startswith(directory):
        return ""
    name = start_after[len(directory) :].split("/")[0]
    for position, character in enumerate(name):
        if character < "/":
            name = name[:position]
            break
    start = directory + name[:-1]
    return start if start.startswith(prefix) and start != prefix else ""
