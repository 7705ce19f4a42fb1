"""Stage `ingest`: untrusted media in, catalog, quarantine and normalized media shards out.

Order of the parts: `sources` finds candidates (`candidates`), `decoding` normalizes each one in a child process, `catalog`
builds the tables, and `stage` connects them and writes the outs.
"""
