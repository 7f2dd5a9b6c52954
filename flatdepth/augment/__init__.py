"""The paste stage: mirrors and art with exact planar truth."""
