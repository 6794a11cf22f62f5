"""Re-embedding a law database: `build(ReembedConfig(db="lawfirm_v2.db", version_id=5))`, see docs/reembedding.md."""
