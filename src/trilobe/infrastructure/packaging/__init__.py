"""Packages that run anywhere: a bundle as an image, as a MONAI Application Package, as a deployment. No torch here.

========================  ===========================================================================
room                      what is made
========================  ===========================================================================
:mod:`.image`             a bundle or an application as a container image, without a daemon
:mod:`.oci`               the format underneath: reproducible OCI image layouts
:mod:`.map`               the manifests ``app.json`` and ``pkg.json``
:mod:`.entry`             what the image does when it starts: run, serve, show, extract
:mod:`.application`       applications: operators composed into a graph
:mod:`.resources`         what they need of a machine: ``@resource(cpu=1, memory="2Gi")``
:mod:`.installed`         the code and the installed packages that serving needs
:mod:`.sbom`              a bundle's bill of materials (CycloneDX)
:mod:`.signing`           detached signatures (Ed25519)
:mod:`.kubernetes`        Deployment, Service, autoscaler and a KServe InferenceService
========================  ===========================================================================
"""
