"""The world that is searched: a BM25 index of a corpus, or a retrieval server."""
