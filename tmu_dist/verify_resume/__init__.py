"""The drill: does a killed run continue as if nothing had happened?"""
